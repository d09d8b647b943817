"""What runs offline, without arguments? A model from a wheel, an SAE, a dictionary, a seed and an anchor set."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loader": [
            "LAYER",
            "load_anchor",
            "load_dictionary",
            "load_embedded_sae",
            "load_featurizer",
            "load_model",
            "load_seed",
            "model_folder",
        ],
    },
)
