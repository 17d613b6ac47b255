package api

import (
	"io"
	"net/http"
	"strconv"

	"github.com/rxvision/rxvision/cluster"
)

func (s *Server) saveSnapshot(r *request) (any, error) {
	if s.cfg.Archives == nil {
		return nil, notBuilt("this server keeps no snapshots")
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	archive, err := s.cfg.Archives.Save(r.Context())
	if err != nil {
		return nil, err
	}
	return streamFunc(func(w http.ResponseWriter) error {
		defer archive.Close()
		h := w.Header()
		h.Set("Content-Type", "application/gzip")
		h.Set("Content-Length", strconv.FormatInt(archive.Length, 10))
		h.Set("Digest", archive.Digest)
		_, err := io.Copy(w, archive)
		return err
	}), nil
}

func (s *Server) restoreSnapshot(r *request) (any, error) {
	if s.cfg.Archives == nil {
		return nil, notBuilt("this server keeps no snapshots")
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	if err := s.cfg.Archives.Restore(r.Context(), r.upload()); err != nil {
		return nil, err
	}
	return nil, nil
}

// schedulerReply wraps the settings as clients read them.
type schedulerReply struct {
	SchedulerConfig *cluster.SchedulerConfiguration
	Index           uint64
}

func (s *Server) schedulerConfig(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		cfg := snap.SchedulerConfig(ws)
		return found{body: &schedulerReply{cfg, cfg.ModifyIndex}, index: cfg.ModifyIndex}
	})
}

func (s *Server) setSchedulerConfig(r *request) (any, error) {
	var cfg cluster.SchedulerConfiguration
	if err := r.decode(&cfg); err != nil {
		return nil, err
	}
	cmd := &cluster.SetSchedulerConfig{Config: &cfg}
	if v := r.query.Get("cas"); v != "" {
		index, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return nil, badRequest("Expect a number for `cas` query string parameter")
		}
		cmd.CheckIndex, cmd.Index = true, index
	}
	if err := honoured(&cfg); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, refused(err)
	}
	return &answer{body: struct {
		Updated bool
		Index   uint64
	}{res.Updated, res.Index}, index: res.Index}, nil
}

// honoured refuses settings that nothing acts on.
func honoured(cfg *cluster.SchedulerConfiguration) error {
	const later = "this version of rxvision does not support %s"
	p := cfg.PreemptionConfig
	switch {
	case cfg.SchedulerAlgorithm == "":
		cfg.SchedulerAlgorithm = "binpack"
	case cfg.SchedulerAlgorithm != "binpack" && cfg.SchedulerAlgorithm != "spread":
		return badRequest("invalid scheduler algorithm %q: use binpack or spread", cfg.SchedulerAlgorithm)
	}
	switch {
	case p.SystemSchedulerEnabled || p.SysBatchSchedulerEnabled:
		return notBuilt(later, "preemption for system and sysbatch jobs: set SystemSchedulerEnabled and SysBatchSchedulerEnabled to false")
	case cfg.MemoryOversubscriptionEnabled:
		return notBuilt(later, "memory oversubscription")
	}
	return nil
}
