//! The shared protocol: session messages, frame codec, ids, codes and HTTP bodies
