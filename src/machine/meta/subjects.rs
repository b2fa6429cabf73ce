//! Which stream's filter overlaps another filter: a tree by tokens, so that ten thousand streams are not compared one
//! by one.

use std::collections::BTreeMap;

use crate::model::{Filter, StreamId};

#[derive(Debug, Default)]
struct Node {
    /// By literal token.
    children: BTreeMap<Box<str>, Node>,
    /// Behind `*`.
    star: Option<Box<Node>>,
    /// Filters that end here.
    end: Vec<StreamId>,
    /// Filters that end here with `>`.
    rest: Vec<StreamId>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.star.is_none() && self.end.is_empty() && self.rest.is_empty()
    }

    fn insert(&mut self, tokens: &mut dyn Iterator<Item = &str>, owner: StreamId) {
        match tokens.next() {
            None => self.end.push(owner),
            Some(">") => self.rest.push(owner),
            Some("*") => self.star.get_or_insert_default().insert(tokens, owner),
            Some(token) => self.children.entry(token.into()).or_default().insert(tokens, owner),
        }
    }

    fn remove(&mut self, tokens: &mut dyn Iterator<Item = &str>, owner: StreamId) {
        let forget = |owners: &mut Vec<StreamId>| {
            if let Some(at) = owners.iter().position(|found| *found == owner) {
                owners.remove(at);
            }
        };
        match tokens.next() {
            None => forget(&mut self.end),
            Some(">") => forget(&mut self.rest),
            Some("*") => {
                if let Some(star) = &mut self.star {
                    star.remove(tokens, owner);
                    if star.is_empty() {
                        self.star = None;
                    }
                }
            }
            Some(token) => {
                if let Some(child) = self.children.get_mut(token) {
                    child.remove(tokens, owner);
                    if child.is_empty() {
                        self.children.remove(token);
                    }
                }
            }
        }
    }

    fn nodes_below(&self) -> impl Iterator<Item = &Node> {
        self.children.values().chain(self.star.as_deref())
    }

    /// The first owner, other than `except`, of a filter that overlaps what is left of one.
    fn find(&self, tokens: &[&str], except: Option<StreamId>) -> Option<StreamId> {
        let other = |owners: &[StreamId]| owners.iter().copied().find(|owner| Some(*owner) != except);
        let Some((token, after)) = tokens.split_first() else {
            return other(&self.end);
        };
        if let Some(owner) = other(&self.rest) {
            return Some(owner);
        }
        match *token {
            ">" => self.nodes_below().find_map(|node| node.find_any(except)),
            "*" => self.nodes_below().find_map(|node| node.find(after, except)),
            token => self
                .children
                .get(token)
                .into_iter()
                .chain(self.star.as_deref())
                .find_map(|node| node.find(after, except)),
        }
    }

    fn find_any(&self, except: Option<StreamId>) -> Option<StreamId> {
        let owners = self.end.iter().chain(&self.rest);
        owners
            .copied()
            .find(|owner| Some(*owner) != except)
            .or_else(|| self.nodes_below().find_map(|node| node.find_any(except)))
    }
}

/// The filters of a namespace's live streams.
#[derive(Debug, Default)]
pub(super) struct SubjectIndex {
    root: Node,
}

impl SubjectIndex {
    pub fn insert(&mut self, filter: &Filter, owner: StreamId) {
        self.root.insert(&mut filter.tokens(), owner);
    }

    pub fn remove(&mut self, filter: &Filter, owner: StreamId) {
        self.root.remove(&mut filter.tokens(), owner);
    }

    /// A stream other than `except` with a filter that overlaps this one. Which of several is always the same.
    pub fn find_overlap(&self, filter: &Filter, except: Option<StreamId>) -> Option<StreamId> {
        let tokens: Vec<&str> = filter.tokens().collect();
        self.root.find(&tokens, except)
    }

    pub fn is_empty(&self) -> bool {
        self.root.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against comparing each with each.
    #[test]
    fn agrees_with_comparing_one_by_one() {
        let tokens = ["a", "b", "*", ">"];
        let mut filters = Vec::new();
        for x in tokens {
            filters.push(x.to_string());
            for y in tokens {
                filters.push(format!("{x}.{y}"));
                for z in tokens {
                    filters.push(format!("{x}.{y}.{z}"));
                }
            }
        }
        let filters: Vec<Filter> = filters.iter().filter_map(|text| Filter::parse(text).ok()).collect();
        for (i, a) in filters.iter().enumerate() {
            let mut index = SubjectIndex::default();
            let owner = StreamId::new(i as u128);
            index.insert(a, owner);
            for b in &filters {
                assert_eq!(index.find_overlap(b, None), a.overlaps(b).then_some(owner), "{a} {b}");
                assert_eq!(index.find_overlap(b, Some(owner)), None);
            }
            index.remove(a, owner);
            assert!(index.is_empty());
        }
    }
}
