"""One thread at a time on the accelerator, while others read and resize.

Of 23 processes in which some threads drew pictures while another one measured them by networks,
seven ended by a segmentation fault in XLA's code for GPUs (jaxlib 0.11.2, H200); of 18 that only
drew them, none. That this lock ends it was not tried on a GPU yet.
"""

import threading

ALONE = threading.RLock()  # held by what runs programs of JAX, until they have ended
