"""Find, load, train, judge and publish a sparse autoencoder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": ["find_sae", "load_sae", "save_sae"],
        "training": ["train_sae"],
        "evaluation": ["evaluate_sae"],
        "hub": ["push_sae_to_hub"],
    },
)
