package cluster

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// hub knows who waits for which change. A watch is kept only for what is waited for: a record, the records of an index
// value, those of a prefix, a table's index. It wakes on the change of just that.
type hub struct {
	current atomic.Pointer[view] // the newest commit

	mu     sync.Mutex
	points map[watchKey]*watched
	n      int // channels there are
	max    int
}

// watchKey is an index of a table; by is "id" for primary keys.
type watchKey struct{ table, by string }

// watched is what is waited for in one index.
type watched struct {
	exact  map[string]chan struct{}
	prefix map[string]chan struct{}
	length map[int]int // prefixes of each length
}

// maxWatches bounds the channels, which stay until what they wait for changes. Beyond it everybody is woken once.
const maxWatches = 1 << 20

var fired = func() <-chan struct{} { c := make(chan struct{}); close(c); return c }()

func newHub() *hub { return &hub{points: map[watchKey]*watched{}, max: maxWatches} }

// watch adds to ws what is closed when records under value (or with that prefix) change; it is closed already
// when same says that the newest commit holds others than were read.
func (h *hub) watch(ws WatchSet, k watchKey, value string, prefix bool, same func(*view) bool) {
	ws.Add(h.channel(k, value, prefix))
	// A commit is published before it fires. So either it is seen here, or it has found the channel.
	if !same(h.current.Load()) {
		ws.Add(fired)
	}
}

func (h *hub) channel(k watchKey, value string, prefix bool) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n >= h.max {
		for _, w := range h.points {
			w.fireAll()
		}
		h.points, h.n = map[watchKey]*watched{}, 0
	}
	w := h.points[k]
	if w == nil {
		w = &watched{exact: map[string]chan struct{}{}, prefix: map[string]chan struct{}{}, length: map[int]int{}}
		h.points[k] = w
	}
	in := w.exact
	if prefix {
		in = w.prefix
	}
	c := in[value]
	if c == nil {
		c = make(chan struct{})
		in[strings.Clone(value)] = c // the value may be a part of a record
		h.n++
		if prefix {
			w.length[len(value)]++
		}
	}
	return c
}

func (w *watched) fireAll() {
	for _, c := range w.exact {
		close(c)
	}
	for _, c := range w.prefix {
		close(c)
	}
}

// publish makes a commit the newest and wakes those who wait for one of its changes.
func (h *hub) publish(v *view, changes []change, indexes []string) {
	h.current.Store(v)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n == 0 {
		return // nobody waits
	}
	if w := h.points[watchKey{TableIndex, "id"}]; w != nil {
		for _, name := range indexes {
			h.fire(w, name)
		}
	}
	for _, c := range net(changes) {
		if w := h.points[watchKey{c.table.Name, "id"}]; w != nil {
			h.fire(w, c.key)
		}
		for _, x := range c.table.indexes {
			w := h.points[watchKey{c.table.Name, x.name}]
			if w == nil {
				continue
			}
			was, is := "", ""
			if c.old != nil {
				was = x.of(c.old)
			}
			if c.new != nil {
				is = x.of(c.new)
			}
			if was != "" {
				h.fire(w, was)
			}
			if is != "" && is != was {
				h.fire(w, is)
			}
		}
	}
}

// net sums up what happened to each record; what came and went is left out.
func net(changes []change) []change {
	type record struct {
		table *Table
		key   string
	}
	at := make(map[record]int, len(changes))
	sum := make([]change, 0, len(changes))
	for _, c := range changes {
		k := record{c.table, c.key}
		if i, ok := at[k]; ok {
			sum[i].new = c.new
		} else {
			at[k] = len(sum)
			sum = append(sum, c)
		}
	}
	return slices.DeleteFunc(sum, func(c change) bool { return c.old == nil && c.new == nil })
}

// fire wakes who waits for a value or one of its prefixes.
func (h *hub) fire(w *watched, value string) {
	if c, ok := w.exact[value]; ok {
		close(c)
		delete(w.exact, value)
		h.n--
	}
	for l := range w.length {
		if l > len(value) {
			continue
		}
		if c, ok := w.prefix[value[:l]]; ok {
			close(c)
			delete(w.prefix, value[:l])
			h.n--
			if w.length[l]--; w.length[l] == 0 {
				delete(w.length, l)
			}
		}
	}
}
