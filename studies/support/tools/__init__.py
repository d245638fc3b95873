"""Other tools that make networks smaller, each behind the same function: a `Job` in, a `Small` network out."""
