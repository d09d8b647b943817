"""What is my training data missing? Feature Activation Coverage and FAC Synthesis (arXiv 2602.10388).

`__init__.pyi` lists the public names. Each is loaded when it is first used, so importing the package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
