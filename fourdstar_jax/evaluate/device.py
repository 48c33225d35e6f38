"""One thread at a time on the accelerator, while others read and resize.

Of processes whose threads drew pictures while another one measured them, every third ended by a
segmentation fault in XLA's code for GPUs (jaxlib 0.11.2, H200, 26 processes).
"""

import threading

ALONE = threading.RLock()  # held by what runs programs of JAX and waits for them
