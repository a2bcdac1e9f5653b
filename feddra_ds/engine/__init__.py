"""One DeepSpeed engine a rank, seen as two parts of fp32 slices. The only package that knows deepspeed."""
