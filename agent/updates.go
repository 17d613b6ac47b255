package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of what is on its way to the servers.
const (
	maxBatchAllocs = 256
	maxBatchBytes  = 2 << 20
	maxUnacked     = 4 // batches
)

// updates holds the newest state of every allocation that the servers have not
// acknowledged: one per allocation, so that it is bounded by what runs here. A
// batch that was lost with its stream is sent again on the next.
type updates struct {
	mu      sync.Mutex
	rev     uint64 // a cluster.Revision
	pending map[string]*pendingUpdate
	order   []string // allocation IDs, the longest waiting first
	seq     uint64
	unacked map[uint64]map[string]uint64 // batch → allocation → revision
	wake    chan struct{}                // capacity 1
}

type pendingUpdate struct {
	alloc *cluster.Allocation
	rev   uint64
	sent  uint64        // newest revision on this stream, 0: none
	done  chan struct{} // closed when nothing is pending any more
}

// newUpdates begins with the run's first revision.
func newUpdates(first uint64) *updates {
	return &updates{rev: first, pending: map[string]*pendingUpdate{}, unacked: map[uint64]map[string]uint64{}, wake: make(chan struct{}, 1)}
}

// put queues the newest state of an allocation and gives it its revision.
func (u *updates) put(a *cluster.Allocation) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.rev++
	p := u.pending[a.ID]
	if p == nil {
		p = &pendingUpdate{done: make(chan struct{})}
		u.pending[a.ID] = p
		u.order = append(u.order, a.ID)
	}
	a.Revision = u.rev
	p.alloc, p.rev = a, u.rev
	u.ring()
}

func (u *updates) ring() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// drop forgets an allocation that the servers forgot.
func (u *updates) drop(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.remove(id)
}

// remove is drop; hold mu.
func (u *updates) remove(id string) {
	if p := u.pending[id]; p != nil {
		close(p.done)
		delete(u.pending, id)
	}
	u.order = slices.DeleteFunc(u.order, func(s string) bool { return s == id })
}

// delivered waits until the newest state of an allocation is acknowledged, for a
// bounded time.
func (u *updates) delivered(ctx context.Context, id string, limit time.Duration) {
	u.mu.Lock()
	p := u.pending[id]
	u.mu.Unlock()
	if p == nil {
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// newStream makes everything unacknowledged to be sent again.
func (u *updates) newStream() {
	u.mu.Lock()
	defer u.mu.Unlock()
	clear(u.unacked)
	for _, p := range u.pending {
		p.sent = 0
	}
	if len(u.pending) > 0 {
		u.ring()
	}
}

// next takes a batch to send, nil when there is none or too many are under way.
func (u *updates) next() (seq uint64, records [][]byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.unacked) >= maxUnacked {
		return 0, nil
	}
	batch, size := map[string]uint64{}, 0
	for _, id := range u.order {
		p := u.pending[id]
		if p.sent == p.rev {
			continue
		}
		b := cluster.Marshal(p.alloc)
		if size += len(b); len(records) == maxBatchAllocs || len(records) > 0 && size > maxBatchBytes {
			u.ring() // there is more
			break
		}
		p.sent = p.rev
		batch[id] = p.rev
		records = append(records, b)
	}
	if records == nil {
		return 0, nil
	}
	u.seq++
	u.unacked[u.seq] = batch
	return u.seq, records
}

// ack forgets what a batch brought, unless it is newer by now.
func (u *updates) ack(seq uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, rev := range u.unacked[seq] {
		if p := u.pending[id]; p != nil && p.rev == rev {
			u.remove(id)
		}
	}
	delete(u.unacked, seq)
	if len(u.pending) > 0 {
		u.ring()
	}
}

// waiting is how many allocations have unacknowledged state.
func (u *updates) waiting() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.pending)
}
