"""How does a trainer fill its own gaps?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "callback": ["FACSynthesisCallback"],
    },
)
