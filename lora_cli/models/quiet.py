"""transformers without its progress bars and advice: what matters is said once, by us."""

from logging import ERROR, getLogger


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):  # which kernels it has not, and how it registers its classes
        getLogger(name).setLevel(ERROR)
    logging.disable_progress_bar()
