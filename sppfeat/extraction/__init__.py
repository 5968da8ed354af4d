"""From a source of images to a store: the plan, the pipeline, and the processes that fill rows."""
