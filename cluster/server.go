package cluster

import (
	"fmt"
	"time"
)

// MaxLeftServers bounds the records of servers that have left; the oldest go first.
const MaxLeftServers = 16

// Server is what the region knows of one of its servers. Raft's own
// configuration says who votes; this record says who that is.
type Server struct {
	ID         string
	Name       string
	Region     string
	Datacenter string
	RaftAddr   string // host:port for other servers
	RPCAddr    string // host:port for agents and gateways
	HTTPAddr   string // host:port for users
	Version    string // of the program
	Rules      uint64 `json:",omitempty"` // the newest version of the rules that it knows: CurrentRules
	Left       bool   // it left, or was removed by an operator
	// Start names the run of the process that left: it may join again only after a
	// restart. "" otherwise.
	Start       string
	CreateIndex uint64
	ModifyIndex uint64
}

// ClusterMeta names the cluster for good: servers of different clusters refuse
// each other by it.
type ClusterMeta struct {
	ClusterID   string
	CreateTime  int64 // unix nanoseconds
	CreateIndex uint64
	ModifyIndex uint64
}

// AutopilotConfig steers the care for servers, with Nomad's names and defaults.
type AutopilotConfig struct {
	CleanupDeadServers      bool          // remove failed servers, as far as the quorum allows
	LastContactThreshold    time.Duration // a server without the leader for longer is unhealthy
	MaxTrailingLogs         uint64        // a server further behind is unhealthy
	MinQuorum               uint          // dead servers are kept when fewer voters would remain
	ServerStabilizationTime time.Duration // a new server is healthy for so long before it votes
	CreateIndex             uint64
	ModifyIndex             uint64
}

// DefaultAutopilotConfig is Nomad's.
func DefaultAutopilotConfig() *AutopilotConfig {
	return &AutopilotConfig{
		CleanupDeadServers: true, LastContactThreshold: 200 * time.Millisecond,
		MaxTrailingLogs: 250, ServerStabilizationTime: 10 * time.Second,
	}
}

// RegisterServer creates or refreshes a server's record.
type RegisterServer struct {
	Stamp
	Server *Server
}

// RemoveServer forgets a server, or with Left keeps its record as one that left.
type RemoveServer struct {
	Stamp
	ID    string
	Left  bool
	Start string // of the process, with Left
}

// SetAutopilotConfig replaces the autopilot settings; with CheckIndex only if
// the current ModifyIndex equals Index.
type SetAutopilotConfig struct {
	Stamp
	Config     *AutopilotConfig
	CheckIndex bool
	Index      uint64
}

// SetClusterMeta names the cluster, once.
type SetClusterMeta struct {
	Stamp
	ClusterID string
}

func (*RegisterServer) kind() Kind     { return KindRegisterServer }
func (*RemoveServer) kind() Kind       { return KindRemoveServer }
func (*SetAutopilotConfig) kind() Kind { return KindSetAutopilotConfig }
func (*SetClusterMeta) kind() Kind     { return KindSetClusterMeta }

// Server returns a server's record by its whole ID.
func (s *Snapshot) Server(ws WatchSet, id string) *Server {
	return first[Server](s.txn, ws, TableServers, "id", id)
}

// Servers returns all servers' records by ID, those that left included.
func (s *Snapshot) Servers(ws WatchSet) []*Server {
	return list[Server](s.txn, ws, TableServers, "id_prefix", "")
}

// Rules is the newest version of the rules that all servers know, so that they all
// make the same of a command: while a region is upgraded it goes by the old ones.
func (s *Snapshot) Rules() uint64 {
	known, none := uint64(CurrentRules), true
	for _, server := range s.Servers(nil) {
		if !server.Left {
			known, none = min(known, server.Rules), false
		}
	}
	if none {
		return 0
	}
	return known
}

// Timeline names the history that the state's indexes count: within one, a record of
// an index is the same everywhere. A restore begins another. "" while the cluster has
// no name.
func (s *Snapshot) Timeline(ws WatchSet) string {
	meta := s.ClusterMeta(ws)
	if meta == nil {
		return ""
	}
	return fmt.Sprintf("%s/%d", meta.ClusterID, meta.ModifyIndex)
}

// AutopilotConfig returns the autopilot settings, the defaults when never set.
func (s *Snapshot) AutopilotConfig(ws WatchSet) *AutopilotConfig {
	if c := first[AutopilotConfig](s.txn, ws, TableAutopilot, "id", "config"); c != nil {
		return c
	}
	return DefaultAutopilotConfig()
}

// ClusterMeta returns the cluster's name; nil before the first leader gave it.
func (s *Snapshot) ClusterMeta(ws WatchSet) *ClusterMeta {
	return first[ClusterMeta](s.txn, ws, TableClusterMeta, "id", "meta")
}
