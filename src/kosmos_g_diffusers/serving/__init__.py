"""What `kosmos-g app` does, without its page: nothing here imports gradio."""
