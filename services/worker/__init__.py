"""Takes jobs from the queue, has the gateway generate, puts the images into the object store."""
