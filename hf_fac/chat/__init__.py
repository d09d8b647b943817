"""What writes text?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Chat", "ChatError", "Completion"],
        "local": ["LocalChat"],
        "endpoint": ["EndpointChat"],
    },
)
