//! All rows, one list a file.

use crate::kinds::row::Row;
use crate::kinds::{apps, batch, core, extension, misc, net, pod, rbac, reviews, service, storage};

pub static ROWS: [&[Row]; 11] = [
    core::ROWS,
    pod::ROWS,
    service::ROWS,
    storage::ROWS,
    apps::ROWS,
    batch::ROWS,
    net::ROWS,
    misc::ROWS,
    rbac::ROWS,
    extension::ROWS,
    reviews::ROWS,
];
