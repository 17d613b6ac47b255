package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/cluster"
)

// recoverEvery is how often a server whose disk has failed tries it again.
const recoverEvery = 2 * time.Second

// ReadOnly is the state of a data folder that cannot be written: the newest
// snapshot that can be read, and the log as far as it is known to be committed.
// Raft does not run, so the server has no vote and no news; what it answers is
// stale. It has the methods of Store that readers use.
//
// A server is driven so:
//
//	for {
//		store, err := raftstore.Open(cfg)
//		var broken *raftstore.Unwritable
//		if errors.As(err, &broken) {
//			frozen, err := raftstore.OpenReadOnly(cfg, broken)
//			… serve stale reads from it until <-frozen.Recovered(), then Close it
//			continue
//		}
//		… the store as ever
//	}
type ReadOnly struct {
	cfg    Config
	log    *slog.Logger
	cause  *Unwritable
	id     string
	fsm    *fsm
	config raft.Configuration
	lock   *os.File
	gauge  prometheus.Gauge

	recovered chan struct{}
	closing   chan struct{}
	closeOnce sync.Once
	done      sync.WaitGroup
}

// OpenReadOnly opens the data folder of cfg for reading, cause being what Open
// gave. It writes nothing but the probe that finds out when the disk works again.
func OpenReadOnly(cfg Config, cause *Unwritable) (_ *ReadOnly, err error) {
	r := &ReadOnly{
		cfg: cfg, log: cfg.Logger, cause: cause, recovered: make(chan struct{}), closing: make(chan struct{}),
		gauge: prometheus.NewGauge(prometheus.GaugeOpts{Name: diskWritable, Help: diskWritableHelp}),
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store in %s for reading: %w", cfg.Dir, err)
		}
	}()
	if r.lock, err = lockFolder(cfg.Dir); err != nil {
		return nil, err
	}
	if err := r.load(); err != nil {
		return nil, errors.Join(wayOut(cfg.Dir, err), r.lock.Close())
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(r.gauge); err != nil {
			return nil, errors.Join(fmt.Errorf("register metrics: %w", err), r.lock.Close())
		}
	}
	r.done.Go(r.waitForDisk)
	r.log.Error("the server is read-only: it answers stale reads until its data folder can be written again",
		"folder", cfg.Dir, "index", r.fsm.appliedIndex(), "error", cause)
	return r, nil
}

// load reads snapshot and log.
func (r *ReadOnly) load() error {
	st, err := openStable(r.cfg.Dir, true)
	if err != nil {
		return err
	}
	defer st.close()
	r.id = string(st.get(idKey))
	var m mark
	if b := st.get(markKey); b != nil {
		if err := cluster.Unmarshal(b, &m); err != nil {
			return err
		}
	}
	r.fsm = newFSM("", r.cfg.createdBy(), nil, func(error) {}, r.closing)
	index, err := r.loadSnapshot()
	if err != nil {
		return err
	}
	if err := r.replay(st, index, m.Commit); err != nil {
		r.log.Warn("the log could be read in part only; reads are as old as that", "index", r.fsm.appliedIndex(), "committed", m.Commit, "error", err)
	}
	return nil
}

// loadSnapshot takes the newest snapshot that can be read and gives raft's index of it.
func (r *ReadOnly) loadSnapshot() (uint64, error) {
	snaps, err := listSnapshots(r.cfg.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	var faults error
	for _, meta := range snaps {
		path, err := verifySnapshot(r.cfg.Dir, meta)
		if err == nil {
			var state *cluster.State
			var head snapshotHead
			if state, head, err = readSnapshot(path); err == nil {
				r.fsm.current.Store(state)
				r.fsm.moved(head.Index, head.Term)
				r.config = meta.Configuration
				return meta.Index, nil
			}
		}
		faults = errors.Join(faults, err)
	}
	return 0, faults
}

// replay applies the log behind the snapshot, as far as it is known to be committed.
func (r *ReadOnly) replay(st *stable, from, to uint64) error {
	entries, err := openLog(string(st.get(storeKey)), r.cfg.Dir, st, walSegment, r.log, true)
	if err != nil {
		return err
	}
	defer entries.Close()
	for i := from + 1; i <= to; i++ {
		var l raft.Log
		if err := entries.GetLog(i, &l); err != nil {
			return fmt.Errorf("log entry %d: %w", i, err)
		}
		switch l.Type {
		case raft.LogCommand:
			if out, ok := r.fsm.Apply(&l).(outcome); ok && out.err != nil {
				return out.err
			}
		case raft.LogConfiguration:
			r.config = raft.DecodeConfiguration(l.Data)
		}
	}
	return nil
}

// waitForDisk tries a write now and then until it succeeds.
func (r *ReadOnly) waitForDisk() {
	size := 1
	if full(r.cause) {
		size = walSegment + MaxEntry // what the log may need at once
	}
	tick := time.NewTicker(recoverEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-r.closing:
			return
		}
		if err := writeProbe(r.cfg.Dir, size); err != nil {
			r.log.Debug("data folder still cannot be written", "error", err)
			continue
		}
		r.log.Info("data folder can be written again", "folder", r.cfg.Dir)
		close(r.recovered)
		return
	}
}

// Recovered is closed when the data folder can be written again: Close this then, and Open.
func (r *ReadOnly) Recovered() <-chan struct{} { return r.recovered }

// Close ends it and gives the data folder free.
func (r *ReadOnly) Close() error {
	var err error
	r.closeOnce.Do(func() {
		close(r.closing)
		r.done.Wait()
		r.fsm.stop()
		if r.cfg.Registerer != nil {
			r.cfg.Registerer.Unregister(r.gauge)
		}
		err = r.lock.Close()
	})
	return err
}

// Err says why the server is read-only; its code is unavailable.
func (r *ReadOnly) Err() error {
	return cluster.Errorf(cluster.CodeUnavailable, "the server is read-only: %v", r.cause)
}

// Apply implements what writers ask of a Store: it refuses.
func (r *ReadOnly) Apply(context.Context, cluster.Command) (cluster.Result, error) {
	return cluster.Result{}, r.Err()
}

// State is what could be read.
func (r *ReadOnly) State() *cluster.State { return r.fsm.current.Load() }

// SnapshotMinIndex gives the state when it is that new, an error otherwise: it never gets newer.
func (r *ReadOnly) SnapshotMinIndex(_ context.Context, index uint64) (*cluster.Snapshot, error) {
	if at := r.fsm.appliedIndex(); at < index {
		return nil, fmt.Errorf("wait for index %d, here it is %d: %w", index, at, r.Err())
	}
	return r.State().Snapshot(), nil
}

// ReadIndex refuses: without raft nobody knows what is newest.
func (r *ReadOnly) ReadIndex(context.Context, bool) error { return r.Err() }

// IsLeader is false.
func (r *ReadOnly) IsLeader() bool { return false }

// LeaderCh gives false once and is closed when ctx ends.
func (r *ReadOnly) LeaderCh(ctx context.Context) <-chan bool {
	ch := make(chan bool, 1)
	ch <- false
	context.AfterFunc(ctx, func() { close(ch) })
	return ch
}

// Leader is not known.
func (r *ReadOnly) Leader() (id, address string) { return "", "" }

// NoLeader says why there is none.
func (r *ReadOnly) NoLeader() error { return r.Err() }

// LastContact is negative: the leader was not heard of.
func (r *ReadOnly) LastContact() time.Duration { return -1 }

// ID is the server's ID.
func (r *ReadOnly) ID() string { return r.id }

// DiskState says why the folder cannot be written.
func (r *ReadOnly) DiskState() DiskState {
	return DiskState{Reason: r.cause.Error(), Since: r.cause.Since}
}

// Servers lists the members as far as this server knew them.
func (r *ReadOnly) Servers() ([]Server, uint64, error) {
	var out []Server
	for _, m := range r.config.Servers {
		server := Server{ID: string(m.ID), Address: string(m.Address), Voter: m.Suffrage == raft.Voter}
		if server.ID == r.id {
			server.Name = r.cfg.Name
		}
		out = append(out, server)
	}
	return out, 0, nil
}

// Stats are the few figures that there are, by Store.Stats' names.
func (r *ReadOnly) Stats() map[string]string {
	return map[string]string{"state": "ReadOnly", "applied_index": fmt.Sprint(r.fsm.appliedIndex()), "num_peers": fmt.Sprint(max(0, len(r.config.Servers)-1))}
}

// SaveArchive writes what could be read into an archive, in the system's folder
// for temporary files. The caller closes it.
func (r *ReadOnly) SaveArchive(ctx context.Context) (*Archive, error) {
	snap, index, term, err := r.fsm.view()
	if err != nil {
		return nil, err
	}
	return writeArchive(&paced{ctx: ctx, closing: r.closing}, filepath.Clean(os.TempDir()), snap, r.cfg.createdBy(), raft.SnapshotMeta{Index: index, Term: term, Configuration: r.config})
}
