package fleet

import (
	"context"
	"errors"
	"io"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// chunkSender is a stream of an artifact's chunks.
type chunkSender interface {
	Context() context.Context
	Send(*pb.ArtifactChunk) error
}

// Artifact implements pb.FleetServer. An artifact that this server has not stored
// comes through it from one that has.
func (s *Server) Artifact(req *pb.ArtifactRequest, stream pb.Fleet_ArtifactServer) error {
	if _, err := s.identify(stream.Context(), "Artifact"); err != nil {
		return err
	}
	r, size, err := s.OpenArtifact(stream.Context(), req.Digest, req.Offset)
	if err != nil {
		return toStatus(err)
	}
	defer r.Close()
	return sendArtifact(stream, r, size)
}

// OpenArtifact gives the bytes of an artifact from an offset, and its whole size,
// from whichever server has stored it. Close them.
func (s *Server) OpenArtifact(ctx context.Context, digest string, offset int64) (io.ReadCloser, int64, error) {
	r, size, err := s.cfg.Blobs.Open(ctx, digest, offset)
	if cluster.CodeOf(err) != cluster.CodeNotFound {
		return r, size, err
	}
	for _, id := range s.others() {
		r, size, there := s.openThere(ctx, id, digest, offset)
		if there == nil {
			return r, size, nil
		}
		if ctx.Err() != nil {
			return nil, 0, ctx.Err()
		}
		if cluster.CodeOf(there) != cluster.CodeNotFound { // it might have had it
			err = there
		}
	}
	return nil, 0, err
}

// openThere reads an artifact that another server has stored.
func (s *Server) openThere(ctx context.Context, serverID, digest string, offset int64) (io.ReadCloser, int64, error) {
	client, err := s.client(serverID)
	if err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := client.Artifact(ctx, &pb.ArtifactRequest{Digest: digest, Offset: offset})
	var first *pb.ArtifactChunk
	if err == nil {
		first, err = stream.Recv()
	}
	if err != nil {
		cancel()
		return nil, 0, fromStatus(serverID, err)
	}
	return &peerArtifact{server: serverID, stream: stream, rest: first.Data, cancel: cancel}, first.Size, nil
}

// peerArtifact reads the chunks that another server sends.
type peerArtifact struct {
	server string
	stream pb.Peers_ArtifactClient
	rest   []byte
	cancel context.CancelFunc
}

func (r *peerArtifact) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		c, err := r.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, fromStatus(r.server, err)
		}
		r.rest = c.Data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *peerArtifact) Close() error { r.cancel(); return nil }

// Artifact implements pb.PeersServer: of what this server has stored itself.
func (p *peerService) Artifact(req *pb.ArtifactRequest, stream pb.Peers_ArtifactServer) error {
	r, size, err := p.server.cfg.Blobs.Open(stream.Context(), req.Digest, req.Offset)
	if err != nil {
		return toStatus(err)
	}
	defer r.Close()
	return sendArtifact(stream, r, size)
}

// sendArtifact sends the bytes of r in chunks; the first, which may be empty, has
// the size.
func sendArtifact(stream chunkSender, r io.Reader, size int64) error {
	buf, first := make([]byte, artifactChunk), true
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 || first {
			chunk := &pb.ArtifactChunk{Data: buf[:n]}
			if first {
				chunk.Size, first = size, false
			}
			if err := stream.Send(chunk); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return toStatus(err)
		}
	}
}
