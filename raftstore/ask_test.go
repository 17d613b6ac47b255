package raftstore

import (
	"context"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// TestAsk asks through every server what only the leader answers.
func TestAsk(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	if _, err := g.leader().Ask(t.Context(), nil); cluster.CodeOf(err) != cluster.CodeUnsupported {
		t.Errorf("nobody answers: %v", err)
	}
	for _, s := range g.all {
		s.Answer(func(_ context.Context, q []byte) ([]byte, error) {
			if string(q) == "bad" {
				return nil, cluster.Errorf(cluster.CodeInvalid, "no question")
			}
			return append(q, " "+s.ID()...), nil
		})
	}
	for _, s := range g.all {
		if a, err := s.Ask(t.Context(), []byte("who?")); err != nil || string(a) != "who? "+g.leader().ID() {
			t.Errorf("%s heard %q, %v; the leader is %s", s.ID(), a, err, g.leader().ID())
		}
		if _, err := s.Ask(t.Context(), []byte("bad")); cluster.CodeOf(err) != cluster.CodeInvalid {
			t.Errorf("%s heard %v", s.ID(), err)
		}
	}
}
