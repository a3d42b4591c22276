//! The supervisor: one small single-threaded process per node that is the parent of every container.
