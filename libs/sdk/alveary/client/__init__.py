"""The areas of the asynchronous client, one module each; `alveary.aio.Client` composes them."""
