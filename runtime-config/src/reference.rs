//! The key table as text for people: the reference page and the commented example.
