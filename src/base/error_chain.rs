//! Errors of libraries say what failed; why is in their sources.

/// An error with everything under it.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let told = cause.to_string();
        // Some tell their source themselves, or say nothing of their own.
        if !text.ends_with(&told) {
            text = format!("{text}: {told}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] Option<Box<Told>>);

    #[test]
    fn nothing_is_told_twice() {
        let refused = Told("refused", None);
        let connect = Told("connect", Some(Box::new(refused)));
        let again = Told("connect", Some(Box::new(connect)));
        let whole = Told("transport: connect", Some(Box::new(again)));
        assert_eq!(error_chain(&whole), "transport: connect: refused");
    }
}
