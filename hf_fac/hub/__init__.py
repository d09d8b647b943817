"""Files and cards to and from the Hub; knows no SAE."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "errors": ["HubError"],
        "repo": ["pull_folder", "push_folder"],
    },
)
