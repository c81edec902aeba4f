//! Environment variables. They are read here and nowhere else.

/// What the environment says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `SETUN_ISA`: instruction set to use instead of the best one that the machine
    /// has, for tests and measurements. Empty counts as not set.
    pub isa: Option<String>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        Self {
            isa: variable("SETUN_ISA").filter(|isa| !isa.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_is_not_set() {
        let with =
            |value: &str| Environment::read(|name| (name == "SETUN_ISA").then(|| value.to_owned()));
        assert_eq!(with("avx2").isa.as_deref(), Some("avx2"));
        assert_eq!(with("").isa, None);
        assert_eq!(Environment::read(|_| None).isa, None);
    }
}
