package agent

import (
	"sync"
	"time"
)

// pulse measures how long servers take to answer heartbeats. One that is frozen must
// be left in time, but one that has much to do is slow with every answer: to leave it
// for another that has as much to do makes only more.
type pulse struct {
	mu   sync.Mutex
	sent time.Time     // of the oldest heartbeat without an answer, zero: there is none
	slow time.Duration // the slowest answer lately
}

// beat notes that a heartbeat is sent.
func (p *pulse) beat(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sent.IsZero() {
		p.sent = now
	}
}

// end notes that the oldest heartbeat was answered, or never will be. What was slow is
// forgotten within some answers.
func (p *pulse) end(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.sent.IsZero() {
		p.slow = max(p.slow-p.slow/8, now.Sub(p.sent))
		p.sent = time.Time{}
	}
}

// patience is how long a server may say nothing: half a TTL, and up to a whole one
// when answers are slow.
func (p *pulse) patience(ttl time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return min(max(ttl/2, 3*p.slow), ttl)
}
