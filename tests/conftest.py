import atexit
import os
import shutil
import signal
import tempfile

import torch

# Tiny tensors: a second thread costs more than it gives, by far when something else runs on the machine.
torch.set_num_threads(1)

# Started in the background, pytest would ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What featurizers keep for later processes stays out of the user's own cache. Set before huggingface_hub is imported.
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)
