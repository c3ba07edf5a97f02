"""The pack's one logger: `logging.getLogger("qwen_lowvram").setLevel("DEBUG")` shows what it does step by step."""

import logging

LOGGER_NAME = "qwen_lowvram"
logger = logging.getLogger(LOGGER_NAME)
