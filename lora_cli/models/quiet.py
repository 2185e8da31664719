"""transformers without its progress bars and advice: what matters is said once, by us."""


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
