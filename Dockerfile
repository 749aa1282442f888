# One node: gRPC on 6000, health and metrics on 6001, its embedded database in the volume unless IM_PRESENCE__STORE__URL
# says otherwise. Both ports listen on all addresses, so it starts only with IM_PRESENCE__AUTH__MODE, or with
# IM_PRESENCE__AUTH__INSECURE=true.

FROM rust:1.95-bookworm AS builder
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY config config
COPY crates crates
COPY migrations migrations
COPY proto proto
COPY src src
COPY web web
# Line numbers stay in panic messages; what only a debugger needs goes.
RUN cargo build --profile dist --locked --bin im-presence && strip --strip-debug target/dist/im-presence

FROM debian:bookworm-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin im-presence \
    && install -d -o im-presence -g im-presence /var/lib/im-presence
COPY --from=builder /build/target/dist/im-presence /usr/local/bin/im-presence
USER 10001:10001
WORKDIR /var/lib/im-presence
VOLUME /var/lib/im-presence
ENV IM_PRESENCE__PRESENCE_SERVICE__HOST=0.0.0.0
ENV IM_PRESENCE__ADMIN__HOST=0.0.0.0
EXPOSE 6000 6001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["im-presence", "health"]
ENTRYPOINT ["im-presence"]
