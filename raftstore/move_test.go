//go:build !race

package raftstore

import (
	"slices"
	"testing"

	"github.com/hashicorp/raft"
)

// Raft 1.7.3 and 1.8.0 log a peer's address without the lock under which it changes
// (https://github.com/hashicorp/raft/issues/681), which the race detector sees whenever a
// server moves.

func TestRestartOfAll(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	mustApply(t, g.follower(), register("a"))
	name := g.leader().member.cluster()
	// All come back on other ports, and find each other through the first.
	for _, s := range slices.Clone(g.all) {
		mustClose(t, s)
	}
	old := slices.Clone(g.all)
	g.all = nil
	for _, s := range old {
		g.start(s.cfg.Name, g.dirs[s])
	}
	g.settled(3)
	if !hasJob(g.leader(), "a") || g.leader().member.cluster() != name {
		t.Error("not the cluster that it was")
	}
	for _, s := range g.all {
		for _, m := range s.configuration().Servers {
			if m.ID == s.id && string(m.Address) != s.Addr() {
				eventually(t, "the new address is known", func() bool {
					return slices.ContainsFunc(s.configuration().Servers, func(m raft.Server) bool { return m.ID == s.id && string(m.Address) == s.Addr() })
				})
			}
		}
	}
	g.agree()
}
