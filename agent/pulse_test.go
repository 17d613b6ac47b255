package agent

import (
	"testing"
	"time"
)

// TestPulse: a server that answers quickly is left after half a TTL, a slow one after
// as long as its answers make likely, at most a TTL; what was slow is forgotten.
func TestPulse(t *testing.T) {
	const ttl = 4 * time.Second
	var p pulse
	now := time.Now()
	answer := func(took time.Duration) {
		p.beat(now)
		p.beat(now.Add(took / 2)) // another one, before the answer
		now = now.Add(took)
		p.end(now)
		p.end(now.Add(time.Hour)) // of no heartbeat
	}
	for _, step := range []struct{ took, want time.Duration }{
		{time.Millisecond, ttl / 2},
		{time.Second, 3 * time.Second},
		{10 * time.Second, ttl},
	} {
		if answer(step.took); p.patience(ttl) != step.want {
			t.Errorf("after an answer of %s: %s, want %s", step.took, p.patience(ttl), step.want)
		}
	}
	for range 30 {
		answer(time.Millisecond)
	}
	if got := p.patience(ttl); got != ttl/2 {
		t.Errorf("after 30 quick answers: %s", got)
	}
}
