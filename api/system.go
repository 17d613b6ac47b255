package api

import "context"

// Collector forgets what has ended; the scheduler is one.
type Collector interface {
	// ForceGC forgets it at once, however short ago it ended, and returns when it is
	// done. It works on any server.
	ForceGC(ctx context.Context) error
}

// collect answers `nomad system gc`. Nomad answers before it begins; here the work
// is done when the answer comes.
func (s *Server) collect(r *request) (any, error) {
	if s.cfg.Collector == nil {
		return nil, notBuilt("this server cannot collect what has ended: it runs without a scheduler")
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	return nil, s.cfg.Collector.ForceGC(r.Context())
}
