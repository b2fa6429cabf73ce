//! What an error says about whether the operation happened.

/// Every error of the product belongs to one class; a client decides by it alone whether to retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetryClass {
    /// Nothing was changed. Retry freely.
    DidNotHappen,
    /// The outcome is unknown. Retry with the same message id or producer sequence.
    MayHaveHappened,
    /// The request itself must change before it can succeed.
    CannotWork,
}

impl RetryClass {
    /// The word used in `google.rpc.ErrorInfo` metadata under "retry".
    pub fn as_str(self) -> &'static str {
        match self {
            RetryClass::DidNotHappen => "did_not_happen",
            RetryClass::MayHaveHappened => "may_have_happened",
            RetryClass::CannotWork => "cannot_work",
        }
    }

    /// The inverse of [`RetryClass::as_str`].
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "did_not_happen" => Some(RetryClass::DidNotHappen),
            "may_have_happened" => Some(RetryClass::MayHaveHappened),
            "cannot_work" => Some(RetryClass::CannotWork),
            _ => None,
        }
    }
}
