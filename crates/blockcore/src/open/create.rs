// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`CreateContext`]: what a driver's `create` gets to know, and how it makes and opens the file it writes to.

use std::sync::Arc;

use super::{NodeKind, NodeRequest, Shared, open_node};
use crate::backend::Backend;
use crate::error::Result;
use crate::node::NodeFlags;
use crate::options::Options;
use crate::perm::Permissions;
use crate::policy::OpenPolicy;
use crate::registry::{Diagnostics, Registry};

/// What a driver's `create` gets to know, and how it makes and opens the file it writes to.
pub struct CreateContext<'a> {
    registry: &'a Registry,
    diagnostics: Diagnostics,
}

impl<'a> CreateContext<'a> {
    pub(crate) fn new(registry: &'a Registry, diagnostics: Diagnostics) -> CreateContext<'a> {
        CreateContext {
            registry,
            diagnostics,
        }
    }
}

impl CreateContext<'_> {
    /// Makes the protocol-level file, `bytes` long, and opens it for writing.
    ///
    /// # Errors
    /// The protocol driver's.
    pub async fn create_file(&self, filename: &str, options: Options) -> Result<Backend> {
        let protocol = self.registry.find_protocol(filename).await?;
        protocol.create(self, filename, options).await?;
        let shared = Arc::new(Shared {
            registry: self.registry.clone(),
            probe: false,
            no_backing: false,
            no_io: false,
            policy: OpenPolicy::Deny,
            diagnostics: self.diagnostics.clone(),
        });
        let request = NodeRequest {
            filename: Some(filename.to_owned()),
            options: Options::new(),
            // A half-made image is of no use after a crash: nothing of it needs to be durable before it is whole.
            flags: NodeFlags {
                no_flush: true,
                ..NodeFlags::default()
            },
            kind: NodeKind::Protocol,
            permissions: Permissions::storage(true),
            ancestors: Vec::new(),
            by_image: false,
            for_check: false,
        };
        let node = open_node(&shared, request).await?;
        node.driver()
            .set_permissions(Permissions::storage(true))
            .await?;
        Ok(Backend::new(node, false))
    }

    /// Takes away a file that [`create_file`](CreateContext::create_file) has made and that is closed again, since no image has come of it. A driver
    /// that can't leaves it.
    pub async fn delete_file(&self, filename: &str) {
        let deleted = match self.registry.find_protocol(filename).await {
            Ok(protocol) => protocol.delete(filename).await,
            Err(e) => Err(e),
        };
        if let Err(e) = deleted {
            tracing::debug!("the half-made image {filename} stays: {e}");
        }
    }

    /// The drivers at hand.
    pub fn registry(&self) -> &Registry {
        self.registry
    }

    /// Where warnings go.
    pub fn diagnostics(&self) -> &Diagnostics {
        &self.diagnostics
    }
}
