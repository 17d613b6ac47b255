package cluster

import (
	"slices"
	"strings"
)

// tree is a persistent B+ tree: strings in order → V. A copy of a tree value keeps what it holds whatever is done to
// the original. Nodes that were made by the same write (its edit number) are changed in place, others are copied.
type tree[V any] struct {
	root *node[V]
	n    int
}

// edit numbers a write transaction; no two of a state are alike. 0 owns nothing.
type edit uint64

// node is a leaf with a value for each key, or has a child for each key, which is the smallest key below that child
// (or was: it may be smaller than that).
type node[V any] struct {
	edit edit
	keys []string
	vals []V
	kids []*node[V]
}

// maxKeys bounds a node; less than a quarter of it and a node joins its neighbour.
const maxKeys = 32

// get looks a key up.
func (t *tree[V]) get(key string) (v V, ok bool) {
	n := t.root
	if n == nil {
		return v, false
	}
	for n.kids != nil {
		n = n.kids[n.below(key)]
	}
	if i, found := slices.BinarySearch(n.keys, key); found {
		return n.vals[i], true
	}
	return v, false
}

// below is the child in which key belongs.
func (n *node[V]) below(key string) int {
	lo, hi := 1, len(n.keys) // the first child takes what is smaller, too
	for lo < hi {
		if mid := (lo + hi) / 2; n.keys[mid] <= key {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo - 1
}

// ascend calls fn for all keys with the prefix, in order, until it returns false.
func (t *tree[V]) ascend(prefix string, fn func(key string, v V) bool) {
	t.from(prefix, func(key string, v V) bool { return strings.HasPrefix(key, prefix) && fn(key, v) })
}

// from calls fn for all keys that are not smaller than key, in order, until it returns false.
func (t *tree[V]) from(key string, fn func(key string, v V) bool) {
	if t.root != nil {
		t.root.from(key, fn)
	}
}

func (n *node[V]) from(key string, fn func(string, V) bool) bool {
	if n.kids != nil {
		for _, kid := range n.kids[n.below(key):] {
			if !kid.from(key, fn) {
				return false
			}
		}
		return true
	}
	i, _ := slices.BinarySearch(n.keys, key)
	for ; i < len(n.keys); i++ {
		if !fn(n.keys[i], n.vals[i]) {
			return false
		}
	}
	return true
}

// set puts a value under a key and says whether the key is new.
func (t *tree[V]) set(e edit, key string, v V) (added bool) {
	if t.root == nil {
		t.root = &node[V]{edit: e, keys: []string{key}, vals: []V{v}}
		t.n = 1
		return true
	}
	root, right, added := t.root.set(e, key, v)
	if right != nil {
		root = &node[V]{edit: e, keys: []string{root.keys[0], right.keys[0]}, kids: []*node[V]{root, right}}
	}
	t.root = root
	if added {
		t.n++
	}
	return added
}

// own gives the node itself if the edit made it, else a copy with room for one more.
func (n *node[V]) own(e edit) *node[V] {
	if n.edit == e {
		return n
	}
	room := min(len(n.keys)+4, maxKeys+1)
	c := &node[V]{edit: e, keys: append(make([]string, 0, room), n.keys...)}
	if n.kids != nil {
		c.kids = append(make([]*node[V], 0, room), n.kids...)
	} else {
		c.vals = append(make([]V, 0, room), n.vals...)
	}
	return c
}

// set gives the node that takes n's place, and one to its right when it became too large.
func (n *node[V]) set(e edit, key string, v V) (self, right *node[V], added bool) {
	n = n.own(e)
	if n.kids == nil {
		i, found := slices.BinarySearch(n.keys, key)
		if found {
			n.vals[i] = v
			return n, nil, false
		}
		n.keys, n.vals = slices.Insert(n.keys, i, key), slices.Insert(n.vals, i, v)
		return n, n.split(i), true
	}
	i := n.below(key)
	kid, extra, added := n.kids[i].set(e, key, v)
	n.kids[i] = kid
	if extra == nil {
		return n, nil, added
	}
	n.keys, n.kids = slices.Insert(n.keys, i+1, extra.keys[0]), slices.Insert(n.kids, i+1, extra)
	return n, n.split(i + 1), added
}

// split halves a node that is too large. One that grew at its end, as it does when keys come in order, stays full.
func (n *node[V]) split(grew int) *node[V] {
	if len(n.keys) <= maxKeys {
		return nil
	}
	at := len(n.keys) / 2
	if grew == len(n.keys)-1 {
		at = grew
	}
	right := &node[V]{edit: n.edit, keys: slices.Clone(n.keys[at:])}
	n.keys = slices.Clone(n.keys[:at]) // no longer than it need be
	if n.kids != nil {
		right.kids, n.kids = slices.Clone(n.kids[at:]), slices.Clone(n.kids[:at])
	} else {
		right.vals, n.vals = slices.Clone(n.vals[at:]), slices.Clone(n.vals[:at])
	}
	return right
}

// drop removes the entry at i.
func (n *node[V]) drop(i int) {
	n.keys = slices.Delete(n.keys, i, i+1)
	if n.kids != nil {
		n.kids = slices.Delete(n.kids, i, i+1)
	} else {
		n.vals = slices.Delete(n.vals, i, i+1)
	}
}

// delete removes a key and says whether it was there.
func (t *tree[V]) delete(e edit, key string) bool {
	if _, ok := t.get(key); !ok {
		return false
	}
	root := t.root.delete(e, key)
	for root != nil && len(root.kids) == 1 {
		root = root.kids[0]
	}
	t.root = root
	t.n--
	return true
}

// delete removes a key that is there; nil when nothing is left.
func (n *node[V]) delete(e edit, key string) *node[V] {
	n = n.own(e)
	if n.kids == nil {
		i, _ := slices.BinarySearch(n.keys, key)
		n.drop(i)
	} else {
		i := n.below(key)
		kid := n.kids[i].delete(e, key)
		switch {
		case kid == nil:
			n.drop(i)
		case len(kid.keys) >= maxKeys/4:
			n.kids[i] = kid
		default:
			n.kids[i] = kid
			n.join(e, i)
		}
	}
	if len(n.keys) == 0 {
		return nil
	}
	return n
}

// join puts a small child together with a neighbour when both fit into one node.
func (n *node[V]) join(e edit, i int) {
	if i == len(n.kids)-1 {
		i--
	}
	if i < 0 || len(n.kids[i].keys)+len(n.kids[i+1].keys) > maxKeys {
		return
	}
	left, right := n.kids[i].own(e), n.kids[i+1]
	if right.kids != nil { // the first child below may hold smaller keys than its own says
		left.keys = append(append(left.keys, n.keys[i+1]), right.keys[1:]...)
		left.kids = append(left.kids, right.kids...)
	} else {
		left.keys = append(left.keys, right.keys...)
		left.vals = append(left.vals, right.vals...)
	}
	n.kids[i] = left
	n.drop(i + 1)
}
