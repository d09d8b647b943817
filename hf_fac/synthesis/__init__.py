"""Missing features in, verified samples out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "synthesizer": ["FACSynthesizer"],
        "report": ["SynthesisReport", "SynthesisResult"],
    },
)
