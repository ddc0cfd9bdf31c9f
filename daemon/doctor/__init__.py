"""``weightd doctor``: what staging and attaching need, looked at one by one."""
