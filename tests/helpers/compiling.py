"""XLA's options of single programs, where conftest's, which compile quickly, will not do."""

import jax

# Loops as users have them: they round alike in programs that differ in sizes only.
USERS_EMITTERS = {"xla_backend_extra_options": ""} if jax.default_backend() == "cpu" else {}
# Everything as users have it: for programs whose rounding or speed counts.
AS_USERS = {"xla_backend_optimization_level": 3} | USERS_EMITTERS
