package raftstore

import (
	"context"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// TestOlderServerCannotJoin: a server notes which rules it knows, and once all go by
// them one that does not know them would make something else of the log.
func TestOlderServerCannotJoin(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	eventually(t, "the region goes by the newest rules", func() bool { return s.State().Snapshot().Rules() == cluster.CurrentRules })
	older := &cluster.Server{ID: newUUID(), Name: "older", Version: "0.0.9", Region: s.cfg.Region, RaftAddr: "127.0.0.1:1"}
	err := s.addServer(context.Background(), older)
	if cluster.CodeOf(err) != cluster.CodeInvalid || !strings.Contains(err.Error(), "upgrade it") {
		t.Fatalf("an older server joins: %v", err)
	}
	if servers, _, err := s.Servers(); err != nil || len(servers) != 1 {
		t.Fatalf("%d members afterwards, %v", len(servers), err)
	}
}

// TestOlderServerIsSpared: a command that an older server of the region would stop at is not proposed.
func TestOlderServerIsSpared(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	eventually(t, "the region goes by the newest rules", func() bool { return s.State().Snapshot().Rules() == cluster.CurrentRules })
	dispatch := func() error {
		_, err := s.Apply(context.Background(), &cluster.DispatchJob{Namespace: "default", JobID: "nobody"})
		return err
	}
	if err := dispatch(); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Fatalf("a dispatch of no job: %v", err)
	}
	older := &cluster.Server{ID: newUUID(), Name: "older", Region: s.cfg.Region, RaftAddr: "127.0.0.1:1", Rules: 1}
	if _, err := s.Apply(context.Background(), &cluster.RegisterServer{Server: older}); err != nil {
		t.Fatal(err)
	}
	if err := dispatch(); cluster.CodeOf(err) != cluster.CodeUnsupported || !strings.Contains(err.Error(), "upgrade older first") {
		t.Fatalf("beside an older server: %v", err)
	}
}
