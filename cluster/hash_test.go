package cluster

import "testing"

func TestHashFollowsTheState(t *testing.T) {
	build := func(last string) *State {
		s := NewState()
		for i, id := range []string{"a", "b", last} {
			c := &SetAlias{Stamp: Stamp{RequestID: id, Time: int64(i)}, Model: "m", Alias: id, Version: 1}
			if _, err := s.Apply(uint64(i+1), EncodeCommand(c)); err != nil {
				t.Fatal(err)
			}
		}
		return s
	}
	one := build("c").Snapshot()
	if one.Hash() != build("c").Snapshot().Hash() {
		t.Error("equal logs, different hashes")
	}
	if one.Hash() == build("d").Snapshot().Hash() || one.Hash() == NewState().Snapshot().Hash() {
		t.Error("different logs, equal hashes")
	}
	restore := NewRestore()
	err := one.Records(func(table *Table, _ string, record any) error { return restore.Add(table, Marshal(record)) })
	if err != nil {
		t.Fatal(err)
	}
	restored, err := restore.Done()
	if err != nil {
		t.Fatal(err)
	}
	if restored.Snapshot().Hash() != one.Hash() {
		t.Error("a restored state has another hash")
	}
}
