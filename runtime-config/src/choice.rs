//! Settings that are one word of a closed list.

/// Declares an enum together with the words that the file and the annotations use for it.
macro_rules! choice {
    ($(#[doc = $doc:literal])+ $name:ident {
        $($(#[doc = $vdoc:literal])+ $variant:ident = $word:literal),+ $(,)?
    }) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[doc = $vdoc])+ $variant),+ }

        impl $name {
            /// Every word, in the order of declaration.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word of this choice.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The choice of a word; case matters.
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

choice! {
    /// Which processor the guest sees.
    CpuModel {
        /// Everything that the host's processor and KVM offer.
        Host = "host",
        /// The x86-64-v2 level of the System V ABI for AMD64.
        V2 = "x86-64-v2",
        /// The x86-64-v3 level (AVX2).
        V3 = "x86-64-v3",
        /// The x86-64-v4 level (AVX-512).
        V4 = "x86-64-v4",
    }
}

choice! {
    /// Page size that backs guest memory on the host.
    HugePages {
        /// Ordinary pages; transparent huge pages may still help.
        None = "none",
        /// hugetlb pages of 2 MiB, taken from the host's pool when the VM starts.
        Size2Mib = "2M",
        /// hugetlb pages of 1 GiB.
        Size1Gib = "1G",
    }
}

impl HugePages {
    /// What guest memory is a multiple of, in bytes. Ordinary pages keep 2 MiB so that the host can
    /// use huge ones.
    #[must_use]
    pub const fn alignment_bytes(self) -> u64 {
        match self {
            Self::None | Self::Size2Mib => 2 << 20,
            Self::Size1Gib => 1 << 30,
        }
    }
}

choice! {
    /// Whether pods start from a saved machine.
    TemplateUse {
        /// Wherever there is a template; the first pod of a shape boots and has one made.
        Auto = "auto",
        /// Never: every pod boots its own kernel and shares no page of memory with another.
        Off = "off",
    }
}

choice! {
    /// How long the guest may keep what it read from a shared directory.
    VirtiofsCache {
        /// Until the host's file changes, as far as open and close tell (close-to-open).
        Auto = "auto",
        /// Without limit: only for directories that nobody else changes.
        Always = "always",
        /// Names and attributes only.
        Metadata = "metadata",
        /// Nothing.
        Never = "never",
    }
}

choice! {
    /// Which log lines are written.
    LogLevel {
        /// Failures only.
        Error = "error",
        /// Failures and what is likely to become one.
        Warn = "warn",
        /// The life of each pod.
        Info = "info",
        /// Every request.
        Debug = "debug",
        /// Every message.
        Trace = "trace",
    }
}
