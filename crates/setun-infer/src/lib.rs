//! setun-infer
