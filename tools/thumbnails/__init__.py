"""Makes the bundled workflows' thumbnails: the workflows run on the miniatures, in a real server."""
