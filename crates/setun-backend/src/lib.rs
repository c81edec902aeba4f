//! setun-backend
