"""Operations with a definition in plain JAX each, and faster forms of it for TPUs and GPUs."""
