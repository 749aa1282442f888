# syntax=docker/dockerfile:1
# One node: gRPC on 6000, health and metrics on 6001, its embedded database in the volume unless IM_PRESENCE__STORE__URL
# says otherwise. Both ports listen on all addresses, so it starts only with IM_PRESENCE__AUTH__MODE, or with
# IM_PRESENCE__AUTH__INSECURE=true.
#
#   docker build -t im-presence --build-arg IM_PRESENCE_COMMIT="$(git rev-parse HEAD)" .

# What writes the list of crates into the program, and beside it. Stands alone, so that it is built once.
FROM rust:1.95-bookworm AS tools
RUN cargo install --locked cargo-auditable@0.7.7 cargo-cyclonedx@0.5.9

FROM rust:1.95-bookworm AS builder
COPY --from=tools /usr/local/cargo/bin/cargo-auditable /usr/local/cargo/bin/cargo-cyclonedx /usr/local/cargo/bin/
WORKDIR /build
COPY Cargo.toml Cargo.lock build.rs ./
COPY config config
COPY crates crates
COPY migrations migrations
COPY proto proto
COPY src src
COPY web web
ARG IM_PRESENCE_COMMIT=""
# Dependencies stay compiled in the caches from one build to the next. What only a debugger needs is not shipped.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo auditable build --profile dist --locked --features otlp --bin im-presence \
    && install -D target/dist/im-presence /image/usr/local/bin/im-presence \
    && strip --strip-debug /image/usr/local/bin/im-presence
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo cyclonedx --format json --spec-version 1.5 --features otlp \
    && install -D -m 644 im-presence.cdx.json /image/usr/share/doc/im-presence/im-presence.cdx.json \
    && mkdir /empty

FROM gcr.io/distroless/cc-debian12:nonroot
ARG IM_PRESENCE_COMMIT=""
LABEL org.opencontainers.image.title="im-presence" \
      org.opencontainers.image.description="The presence and routing daemon of an instant-messaging system" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.revision="${IM_PRESENCE_COMMIT}"
COPY --from=builder /image/ /
COPY --from=builder --chown=10001:10001 /empty /var/lib/im-presence
USER 10001:10001
WORKDIR /var/lib/im-presence
VOLUME /var/lib/im-presence
ENV IM_PRESENCE__PRESENCE_SERVICE__HOST=0.0.0.0
ENV IM_PRESENCE__ADMIN__HOST=0.0.0.0
EXPOSE 6000 6001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["im-presence", "health"]
ENTRYPOINT ["im-presence"]
