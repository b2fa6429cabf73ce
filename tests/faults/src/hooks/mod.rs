//! The interposed functions, by theme. Each looks up cheaply whether it concerns a watched file; if not, it calls the
//! C library's own at once.

mod clock;
mod data;
mod guard;
mod names;
mod open;
mod space;
mod sync;
