package raftstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/rxvision/rxvision/raftstore/pb"
)

// clusterFile notes to which cluster the data folder belongs.
const clusterFile = "cluster.json"

// membership is how this server stands to a cluster:
//
//   - it belongs to none;
//   - it is promised: bound to a formation, which may begin or be called off;
//   - it has asked to join one, and waits for the leader to reach it;
//   - it has begun: a member speaks raft to it, and nothing is on disk yet;
//   - it belongs to one, for good.
//
// A promise is on disk before anybody hears of it, so that no server can help to
// begin two clusters. That it belongs to one is noted only once its log is not
// empty: a note without a log means that the log was lost. (A folder from before
// clusters had IDs belongs to one whose ID is learned from its state.)
type membership struct {
	path string

	mu      sync.Mutex
	note    clusterNote
	joining string // cluster that this server has asked to join
	begun   string // cluster whose members speak raft to it
}

// clusterNote is the file.
type clusterNote struct {
	ClusterID string // "" for none
	// Initiator, when it is set, makes this a promise: the server that may begin the cluster.
	Initiator, InitiatorAddr string `json:",omitempty"`
}

// openMembership reads the note. A folder that holds a log has passed the stage
// of promises.
func openMembership(dir string, used bool) (*membership, error) {
	m := &membership{path: filepath.Join(dir, clusterFile)}
	b, err := os.ReadFile(m.path)
	if errors.Is(err, os.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(b, &m.note)
	if err == nil && m.note.ClusterID == "" {
		err = errors.New("it names no cluster")
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged (%w); delete it if this server's cluster still runs, it is written again then", m.path, err)
	}
	if promise := m.note.Initiator != ""; used && promise {
		return m, m.write(clusterNote{ClusterID: m.note.ClusterID})
	} else if !used && !promise {
		return nil, fmt.Errorf("it belongs to cluster %s but its log is gone; delete the whole folder, so that this server joins as a new one", m.note.ClusterID)
	}
	return m, nil
}

// write replaces the note, durably. The caller holds mu, or is alone.
func (m *membership) write(n clusterNote) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := writeFile(m.path, append(b, '\n')); err != nil {
		return err
	}
	m.note = n
	return nil
}

// cluster is the ID of the cluster that this server belongs to; "" for none, or
// while it is not known.
func (m *membership) cluster() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.begun == "" && m.note.Initiator == "" {
		return m.note.ClusterID
	}
	return m.begun
}

// promise is the formation that this server is bound to, nil when it is not.
func (m *membership) promise() *clusterNote {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.note.Initiator == "" {
		return nil
	}
	n := m.note
	return &n
}

// bind promises this server to a formation.
func (m *membership) bind(f *pb.Formation) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.begun != "" || m.joining != "":
		return fmt.Errorf("this server belongs to cluster %s, or is about to", m.begun+m.joining)
	case m.note.ClusterID == "":
		return m.write(clusterNote{f.Id, f.Initiator, f.Addr})
	case m.note.Initiator == "":
		return fmt.Errorf("this server belongs to cluster %s already", m.note.ClusterID)
	case m.note.ClusterID != f.Id:
		return fmt.Errorf("this server is promised to the formation that server %s at %s began", m.note.Initiator, m.note.InitiatorAddr)
	}
	return nil
}

// release takes a promise back.
func (m *membership) release(formation string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.note.Initiator == "" || m.note.ClusterID != formation || m.begun != "" {
		return nil
	}
	if err := os.Remove(m.path); err != nil {
		return err
	}
	m.note = clusterNote{}
	return syncFolder(filepath.Dir(m.path))
}

// join allows the leader of a cluster to begin with this server.
func (m *membership) join(cluster string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.joining = cluster
}

// begin makes this server part of a cluster that it is promised to or has asked
// to join, because a member of it speaks raft to it; false for any other cluster.
func (m *membership) begin(cluster string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	promised := m.note.Initiator != "" && m.note.ClusterID == cluster
	asked := m.note.ClusterID == "" && m.joining == cluster
	if promised || asked {
		m.begun = cluster
	}
	return promised || asked
}

// belong notes the cluster's ID for good.
func (m *membership) belong(cluster string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.note == (clusterNote{ClusterID: cluster}) {
		return nil
	}
	if m.note.Initiator == "" && m.note.ClusterID != "" && m.note.ClusterID != cluster {
		return fmt.Errorf("%s says that this server belongs to cluster %s, but its state says %s; put the right folder back", m.path, m.note.ClusterID, cluster)
	}
	return m.write(clusterNote{ClusterID: cluster})
}

// writeFile replaces a small file durably.
func writeFile(path string, content []byte) error {
	f, err := os.OpenFile(path+tmpSuffix, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+tmpSuffix, path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}
