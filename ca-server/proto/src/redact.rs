//! What may be shown of a message that carries a secret.

use std::fmt;

use crate::ca::JoinRequest;

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("token", &"<secret>")
            .field("node", &self.node)
            .field("csr_bytes", &self.csr.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_of_a_join_request_is_not_shown() {
        let request = JoinRequest { token: vec![77; 32], node: "node-a".into(), csr: vec![] };
        let shown = format!("{request:?}");
        assert!(shown.contains("<secret>") && !shown.contains("77"), "{shown}");
    }
}
