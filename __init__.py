"""ComfyUI-QwenImage-LowVRAM: Qwen-Image on small graphics cards."""

if __package__:  # a plain import of this file, as test collection does it, is not ComfyUI loading the pack
    import comfyui_version

    from .engine.environment import environment_problem, import_problem, is_of_others
    from .engine.log import logger

    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY = {}, {}, None
    _problem = environment_problem(comfyui_version.__version__)
    if _problem is None:
        try:
            from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

            WEB_DIRECTORY = "./js"
        except (ImportError, AttributeError, RuntimeError) as error:  # names that another version does not have
            if not is_of_others(error, __package__):
                raise  # ComfyUI shows where, and runs on
            logger.debug("The import that failed:", exc_info=True)
            _problem = import_problem(error, comfyui_version.__version__)
    if _problem is not None:
        logger.error("%s", _problem)

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
