import torch

# Tiny tensors: a second thread costs more than it gives, by far when something else runs on the machine.
torch.set_num_threads(1)
